"""The agent of one machine: it starts and stops workers, lists models and engines, and reports. It decides nothing."""
