"""Object stores behind one small interface.

`base` the interface and its errors; `file_store` folders (`file://`); `s3_store` S3 and what speaks like it (`s3://`),
with `s3_errors` saying what its errors mean; `folder` a folder of a store as a store; `open` the table of schemes.
"""
