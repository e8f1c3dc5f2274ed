"""pyinfra deploys, one a role. They read host.data and decide nothing."""
