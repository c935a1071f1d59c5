"""What every part of the suite shares: the command line, files, the run folder, the Hub, signals. No torch."""
