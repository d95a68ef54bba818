"""Who talks to people: the kvq command line."""
