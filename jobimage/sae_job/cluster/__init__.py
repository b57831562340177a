"""What a researcher sees of a cluster from a machine outside it: resources, their pods' logs, and their results."""
