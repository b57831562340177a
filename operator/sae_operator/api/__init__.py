"""The custom resources as pydantic models: the one source of the CRDs, of validation and of the reference docs.

`base` what every model shares; `store`, `run_settings`, `activation_cache`, `training_job` the specs; `status` the
statuses; `resources` the table of kinds; `identity` what makes two caches the same; `steps` the contract between
operator and pods; `manifest` reads YAML, `problems` says what is wrong with it; `schema` turns models into structural
schemas, of which `crd` makes the CustomResourceDefinitions and `reference` the documentation.
"""
