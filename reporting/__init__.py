"""Many runs: from records to tables, figures and pages."""
