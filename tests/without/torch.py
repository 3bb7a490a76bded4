"""What processes of tests find in PyTorch's place: the writer of logs imports it for seconds."""

raise ImportError("no test's process needs PyTorch")
