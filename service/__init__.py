"""The service around the core: requests, evidence, stores, the control API, model servers, the command line."""
