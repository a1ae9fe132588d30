"""What a run shows while it trains."""
import time

from tqdm import tqdm


def rounded(rate):
    """A rate as text, with decimals where it has few digits."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


class Progress:
    """A tqdm bar on a terminal; a line now and then in a file or a pipe; nothing on ranks other than 0."""

    def __init__(self, steps, done, batch_size, rank):
        self.quiet, self.batch_size = rank != 0, batch_size
        disable = True if self.quiet else None  # None: unless it writes to a terminal
        self.bar = tqdm(total=steps * batch_size, initial=done * batch_size, unit="img", unit_scale=True,
                        smoothing=0.05, dynamic_ncols=True, disable=disable)
        self.total, self.done, self.first = steps, done, done
        self.start = self.last_line = time.perf_counter()

    def step(self, loss, lr):
        self.done += 1
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}", refresh=False)
        self.bar.update(self.batch_size)
        now = time.perf_counter()
        if self.bar.disable and not self.quiet and now - self.last_line > 10:
            rate = (self.done - self.first) / (now - self.start)  # steps per second
            left = round((self.total - self.done) / rate)
            print(f"step {self.done}/{self.total}  loss {loss:.3f}  lr {lr:.1e}  "
                  f"{rounded(rate * self.batch_size)} images/s  {left // 60}:{left % 60:02d} left", flush=True)
            self.last_line = now

    def epoch(self, row, epochs, metrics):
        if not self.quiet:
            scores = "  ".join(f"{name} {row[metric]:.2f}" for metric, name in metrics.items())
            val_loss = f"val loss {row['val_loss']:.3f}  " if "val_loss" in row else ""
            memory = f"  {row['memory'] / 1e9:.1f} GB" if row["memory"] else ""
            tqdm.write(f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  {val_loss}{scores}  "
                       f"{rounded(row['images_per_s'])} images/s, {row['waiting']:.0%} waiting for data  "
                       f"evaluated in {row['evaluation_s']:.1f} s, saved in {row['saving_s']:.1f} s{memory}")

    def say(self, lines):
        if not self.quiet:
            for line in lines:
                tqdm.write(line)

    def close(self):
        self.bar.close()
