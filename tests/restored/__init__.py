"""What is restored, copied or moved fails closed; the printed command is followed, and the work goes on."""
