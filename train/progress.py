"""What a command shows while it works: how fast it is, and how much time is left."""
import sys
import time

from tqdm import tqdm


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
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}", refresh=False)
            self.bar.update(self.batch_size)
        elif not self.quiet and (now := time.perf_counter()) - self.last_line > 10:
            rate = (self.done - self.first) / (now - self.start)  # steps per second
            left = (self.total - self.done) / rate
            print(f"step {self.done}/{self.total}  loss {loss:.3f}  lr {lr:.1e}  {rate_of(rate * self.batch_size)} "
                  f"images/s  {clock(left)} left", flush=True)
            self.last_line = now

    def epoch(self, row, epochs, metrics):
        if not self.quiet:
            scores = "  ".join(f"{name} {row[metric]:.2f}" for metric, name in metrics.items())
            val_loss = f"val loss {row['val_loss']:.3f}  " if "val_loss" in row else ""
            memory = f"  {row['memory'] / 1e9:.1f} GB" if row["memory"] else ""
            tqdm.write(f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  {val_loss}{scores}  "
                       f"{rate_of(row['images_per_s'])} images/s, {row['waiting']:.0%} waiting for data  "
                       f"evaluated in {row['evaluation_s']:.1f} s, saved in {row['saving_s']:.1f} s{memory}")

    def say(self, lines):
        if not self.quiet:
            for line in lines:
                tqdm.write(line)

    def close(self):
        self.bar.close()


class Remaining:
    """Speed and time left of a loop, in words; none in its first two seconds, and none at its end."""

    def __init__(self, total, unit="images"):
        self.total, self.unit, self.start = total, unit, time.perf_counter()

    def after(self, done):
        """"  2.5 images/s  1:20 left" when so many are done, or ""."""
        seconds = time.perf_counter() - self.start
        if seconds < 2 or not 0 < done < self.total:
            return ""
        left = seconds * (self.total - done) / done
        speed = f"{rate_of(done / seconds)} {self.unit}/s  " if self.unit else ""
        return f"  {speed}{clock(left)} left"


class Watched:
    """A loader that tells on stderr how far it is: a bar on a terminal, else a line after two seconds and then every
    ten. The ranks other than 0 tell nothing."""

    def __init__(self, loader, images, rank):
        self.loader, self.dataset, self.images, self.quiet = loader, loader.dataset, images, rank != 0

    def __iter__(self):
        total, said = len(self.loader), time.perf_counter() - 8
        remaining = Remaining(self.images)
        bar = tqdm(self.loader, unit="batch", leave=False, dynamic_ncols=True, disable=True if self.quiet else None)
        for number, batch in enumerate(bar, 1):
            yield batch
            now = time.perf_counter()
            if bar.disable and not self.quiet and now - said > 10:
                done = self.images * number // total
                print(f"{done}/{self.images} images{remaining.after(done)}", file=sys.stderr, flush=True)
                said = now


def rate_of(value):
    """A number of things a second as text: below 10 with decimals."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def clock(seconds):
    """Minutes and seconds, after an hour also hours, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
