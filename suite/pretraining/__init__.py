"""--mode pretrain: masked language modelling on reviews without their labels, in the loop of main.py."""
