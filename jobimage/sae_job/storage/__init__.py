"""Object stores behind one small interface.

`base` the interface and its errors; `file_store` folders (`file://`); `s3_store` S3 and what speaks like it (`s3://`),
with `s3_errors` saying what its errors mean; `open` the table of schemes.
"""
