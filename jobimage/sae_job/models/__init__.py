"""Language models and their activations at hook points.

`load` picks the loader that a spec names. `loader` loads checkpoints of Transformers (`checkpoint`), with `anatomy` to
find out what a model is made of without its weights; `huggingface` and `transformer_lens` say what a model's places are
called. `hooked` runs a model up to its last hook; `full` runs all of it with activations replaced; both through
`forward`, and through `sites` where activations are seen. `facts` says what is known of a model beforehand; `mirror`
brings models to this machine that lie in an object store.
"""
