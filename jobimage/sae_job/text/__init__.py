"""From data sets to contexts: reading documents, tokenizing them, packing and storing contexts.

`documents` opens a data set; `tokenize` turns its texts into token ids; `contexts` cuts their stream into contexts;
`blocks` stores contexts in blocks of fixed size and in shuffled order; `plan` decides which contexts each shard of a
cache takes; `hub` resolves revisions to commits.
"""
