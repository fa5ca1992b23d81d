"""The index: disposable, made from segments."""
