"""Recording of LeRobot datasets: options, attempts, and safe handling of interrupts and folders."""
