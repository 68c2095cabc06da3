"""`expunge doctor`: is the installation sound, and does anything of a text lie anywhere in it?"""
