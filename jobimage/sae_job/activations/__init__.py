"""Activations in the store: what shards look like, how they are written, and how training reads them.

`format` names, keys and the bytes of a shard; `contexts` the tokens to run the model on; `statistics` exact sums;
`sink_filter` which positions become rows; `writer` shards to the store; `manifest` what a finished cache says of
itself; `mixing` the order of rows; `loading` shards from the store, ahead of need; `reader` batches of mixed rows.
"""
