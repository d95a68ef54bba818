"""What ``kvq doctor`` looks at, one small function a check; none of them loads weights."""
