"""What the machine is asked: errors, command lines, files, hardware, number formats, memory."""
