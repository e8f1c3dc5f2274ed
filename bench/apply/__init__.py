"""rbee apply against ansible-playbook and the pyinfra command, on real hosts."""
