"""Small environments for test_environment.py, named by import path."""

import time


class Counting:
    """Says how much was said, for as many turns as the record's id asks; each turn is worth its length, less its number."""

    def reset(self, record, seed):
        self.turns, self.seen, self.seed = 1 + record.get("id", seed) % 3, [], seed
        return "ab"[: 1 + seed % 2]

    def step(self, action):
        self.seen.append(action)
        return "cd" * (1 + len(action) % 2), len(action) - 0.5 * len(self.seen), len(self.seen) == self.turns


class Wanted:
    """Two turns; each is worth 1 if it begins with g."""

    def reset(self, record, seed):
        self.left = 2
        return "a"

    def step(self, action):
        self.left -= 1
        return "b", float(action[:1] == "g"), self.left == 0


class Broken(Counting):
    def step(self, action):
        raise KeyError("board")


class Stuck(Counting):
    def step(self, action):
        time.sleep(30)
