"""One job at a time at a place: a lock that ends with its process, however that ends."""

from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import InputError


class JobLock:
    """Held by the job that is at work; on one process of it. On a network file system it needs that system's locks.

    Args:
        path: the lock's own file, which `release` removes; one that a crash leaves holds nobody up.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path, timeout=0, fallback_to_soft=False)

    def acquire(self, refusal: str) -> None:
        """Take the lock; no effect where it is held already.

        Raises:
            InputError: `refusal`, as another job holds it.
        """
        if self._lock.is_locked:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(refusal) from None
        except OSError as error:
            problem = f"{self.path} cannot be locked ({error.strerror or error})"
            raise InputError(
                f"{problem}; a file system with locks is needed, as one job must not meet another"
            ) from None

    def require_free(self, refusal: str) -> None:
        """Refuse at once what `acquire` would refuse; where nobody holds the lock, nothing is made.

        Raises:
            InputError: `refusal`, as another job holds the lock.
        """
        if self.path.exists():
            self.acquire(refusal)
            self.release()

    def release(self) -> None:
        """Let other jobs have the place; without effect where the lock is not held."""
        if self._lock.is_locked:
            self.path.unlink(missing_ok=True)
            self._lock.release()
