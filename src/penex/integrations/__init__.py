"""penex inside other libraries, each an extra of the package and imported on first use.

:mod:`penex.integrations.sklearn` (extra ``sklearn``), :mod:`penex.integrations.huggingface`
(extra ``transformers``) and :mod:`penex.integrations.lightning` (extra ``lightning``).
"""
