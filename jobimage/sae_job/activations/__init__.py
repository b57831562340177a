"""Activations in the store: what shards look like, how they are written, and how training reads them.

`format` names, keys and the bytes of a shard; `codecs` number formats; `contexts` the tokens to run the model on;
`harvest` and `filling` contexts to rows; `sink_filter` which rows stay; `statistics` exact sums; `writer` shards to
the store; `manifest` what a finished cache says of itself; `mixing` the order of rows; `loading` tensors of shards from
the store, ahead of need; `gathering` and `batches` batches of mixed rows, from any source of shards: `reader` from a
finished cache, `live` from a model that runs beside the training.
"""
