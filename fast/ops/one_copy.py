"""Operators of torch.library are one a process: a second copy of this package would take those of the first, silently.

Copies are ``fast`` of a checkout, ``autofocusformer.fast`` of an installed wheel, or a folder copied into a project.
Importing this file, before any operator is made, ends in an ImportError if there is another copy.
"""

import torch

_first = getattr(torch.ops.aff, "made_by", __package__)
if _first != __package__:
    raise ImportError(f"{__package__}: {_first} has made the operators aff::* in this process; import one of the two")
torch.ops.aff.made_by = __package__
