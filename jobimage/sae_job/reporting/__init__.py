"""How a step tells what it does: live progress, the HTTP endpoint, the termination message, logs, and the report."""
