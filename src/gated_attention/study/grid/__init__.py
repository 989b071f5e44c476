"""A study of many points: settings crossed with each other, run as one, and judged by learning rate."""
