"""Integrations with other libraries. Each needs an extra and is imported on first use.

:mod:`penex.integrations.sklearn` (extra ``sklearn``), :mod:`penex.integrations.huggingface`
(extra ``transformers``) and :mod:`penex.integrations.lightning` (extra ``lightning``).
"""
