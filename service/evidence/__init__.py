"""What an auditor reads: events, signed certificates, and a verifier that shares nothing with their writer."""
