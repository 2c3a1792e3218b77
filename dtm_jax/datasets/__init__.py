"""Data sets: one module each, `build(split, **options) -> data.Dataset`, named in `config.data.dataset`.

Every `build` takes `data_dir`, the place of the files, where None means the usual place.
"""
