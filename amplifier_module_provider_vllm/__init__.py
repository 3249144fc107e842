# SPDX-License-Identifier: MIT
"""The module `vllm_provider` under the name that Amplifier's `source:` loader looks for."""

from vllm_provider import VLLMProvider, __amplifier_module_type__, mount, on_session_ready

__all__ = ["VLLMProvider", "__amplifier_module_type__", "mount", "on_session_ready"]
