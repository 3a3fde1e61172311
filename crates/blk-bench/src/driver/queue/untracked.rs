//! A queue whose device has died and left no record of the requests in flight.

use super::{Completion, Queue, Request, Slot};
use crate::error::Error;

impl Queue {
    /// As [`Queue::reap`], for a device that has no record of its predecessor's requests in flight
    /// and starts after the last request answered in order: it can answer a request again that was
    /// answered out of order. Returns the number of such answers; they are not in `done`.
    ///
    /// # Errors
    /// [`Error::BadHead`] if it answers what never was a request.
    pub fn reap_repeated(&mut self, done: &mut Vec<Completion>) -> Result<usize, Error> {
        let mut repeated = 0;
        for _ in 0..self.ring.used_pending() {
            match self.next_answer()? {
                (_, _, None) => repeated += 1,
                (slot, len, Some(request)) => done.push(self.completion(slot, len, request)),
            }
        }
        Ok(repeated)
    }

    /// Whether the device has given an answer for each entry of the available ring.
    pub fn is_caught_up(&self) -> bool {
        self.ring.is_caught_up()
    }

    /// The requests that the device has not answered, by the index of their slots.
    pub fn unanswered(&self) -> impl Iterator<Item = (usize, Request)> {
        let all = self.in_flight.iter().enumerate();
        all.filter_map(|(slot, request)| Some((slot, (*request)?)))
    }

    /// Gives up what the device has not answered; gives how many requests that were. Only a device
    /// that [has caught up](Queue::is_caught_up) does not touch their memory any more.
    pub fn give_up(&mut self) -> usize {
        assert!(self.is_caught_up());
        let slots =
            (0..self.layout.depth).filter(|slot| self.in_flight[usize::from(*slot)].is_some());
        self.free.extend(slots.map(Slot));
        self.in_flight.fill(None);
        std::mem::take(&mut self.in_flight_count)
    }
}
