"""What a pod needs of its cluster, tried out: `sae-job doctor`.

`findings` what a check tells; `store` what object stores must promise; `software` versions and devices; `machine`
folders and memory; `network` whether pods reach each other.
"""
