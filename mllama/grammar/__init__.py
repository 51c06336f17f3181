"""Answers that have a form: grammars of JSON and of calls, and the tokens that each step may take.

A grammar is a text (`forms`), compiled with a tokenizer's vocabulary (`compiling`) into a constraint for each
answer. It needs `llguidance`, of the extra `server`, which is imported where a grammar is compiled.
"""
