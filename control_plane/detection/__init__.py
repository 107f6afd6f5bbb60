"""From sums of windows to findings: what is unusual, how large it is, and its likely cause. Pure, without database."""
