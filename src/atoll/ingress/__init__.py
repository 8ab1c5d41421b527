"""The way in: Envoy, configured over delta ADS from what the control plane says of apps and their endpoints."""
