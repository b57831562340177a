"""Sub-commands of `sae-job`, one file per subject; heavy imports stand inside the functions that need them."""
