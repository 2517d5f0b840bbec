"""A model of what the CUDA kernels cost on Hopper, read off their machine code.

:mod:`model.sass` reads a disassembly; :mod:`model.paths` finds the way of a warp through it; :mod:`model.processor`
runs ways on a model of a multiprocessor; :mod:`model.problems` and :mod:`model.block_attention` describe kernels and
the problems that times are predicted for, as :mod:`model.memory`, :mod:`model.grid`, :mod:`model.key_conv` and
:mod:`model.decode` do of the other ops; :mod:`model.report` writes the tables.
"""
