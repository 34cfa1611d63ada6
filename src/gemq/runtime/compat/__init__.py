"""Private interfaces of PyTorch and Transformers, and nothing else. All other modules use the public ones.

A private interface can change in any release. Each function says what it relies on, since which version that exists,
and what breaks when it changes. ``tests/unit/test_compat.py`` has a test for each, which names the function to correct.
"""
