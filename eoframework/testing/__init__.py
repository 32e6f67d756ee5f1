"""What tests of programs built on eoframework need: real services in containers (`eoframework.testing.containers`)."""
