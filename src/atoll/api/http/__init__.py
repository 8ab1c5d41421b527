"""The service over HTTP: thin handlers, one table of routes, and the server that runs them."""
