//! How a worker is told to end.

use tokio_util::sync::CancellationToken;

/// Two wishes, one after the other; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    /// Take no more jobs; what runs may end within the grace.
    pub stop: CancellationToken,
    /// Give back at once what still runs.
    pub hurry: CancellationToken,
}

impl Drain {
    /// A worker that is not told to end.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Passes on a signal to end: the first stops, the second hurries.
    pub fn signal(&self) {
        if self.stop.is_cancelled() {
            self.hurry.cancel();
        }
        self.stop.cancel();
    }
}
