"""Language models and their activations at hook points.

`load` picks the loader that a spec names; `huggingface` is the one there is, with `anatomy` to find out what a model is
made of without its weights; `hooked` runs a model up to its last hook; `full` runs all of it with activations replaced;
`facts` says what is known of a model beforehand.
"""
