"""Break real parts under real load, and audit every stream: `make test-faults`."""
