"""The extension under ThreadSanitizer: ``make races`` builds it and calls ``python -m tests.races``."""
