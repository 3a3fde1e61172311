//! A simulated faulty kernel (see [`crate::fault_injection`]): parts are held back, begun in any
//! order, come up short, fail at once or half-way, and complete in any order.
//!
//! Parts that were begun are waited for, and the completions are then shuffled, so that the order
//! depends on the seed and not on the kernel.

use std::collections::VecDeque;
use std::io;

use super::{Action, Completion, Part, Ring, WATCH};
use crate::fault_injection::{below, one_in, prefix};

/// State of a ring with fault injection.
#[derive(Default)]
pub(super) struct Injected {
    /// Parts that have not reached the kernel yet: the index of the request, and of the part in it.
    held: Vec<(usize, usize)>,
    /// Completions of parts that have not been reported yet.
    done: VecDeque<Completion>,
    /// Completions of watched descriptors.
    watched: VecDeque<Completion>,
}

impl Injected {
    /// Holds a part back.
    pub(super) fn hold(&mut self, slot: usize, part: usize) {
        self.held.push((slot, part));
    }

    /// Some parts have not reached the kernel yet.
    pub(super) fn is_busy(&self) -> bool {
        !(self.held.is_empty() && self.done.is_empty() && self.watched.is_empty())
    }

    /// One of the completions, if any; they are not all reported at the same time.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let part = if one_in(4) { None } else { self.done.pop_front() };
        part.or_else(|| self.watched.pop_front())
    }

    /// Some of the parts, in any order; at least one if there is nothing else to wait for.
    fn choose(&mut self, wait: bool) -> Vec<(usize, usize)> {
        let least = usize::from(wait && self.done.is_empty() && self.watched.is_empty());
        let least = least.min(self.held.len());
        let count = least + below(self.held.len() - least + 1);
        (0..count).map(|_| self.held.swap_remove(below(self.held.len()))).collect()
    }
}

/// The fate of a part.
struct Fate {
    /// This much of it is done, in bytes.
    len: u64,
    /// Then this happens.
    errno: Option<i32>,
}

impl Fate {
    fn of(part: &Part) -> Self {
        let is_allocation = matches!(part.action, Action::Allocate(_));
        let no_space = if part.action == Action::Read { libc::EIO } else { libc::ENOSPC };
        let (len, errno) = match below(24) {
            0 => (0, Some(libc::EIO)),
            1 => (0, Some(no_space)),
            2 => (some_of(part), Some(no_space)),
            3 => (0, Some(libc::EINTR)),
            4 => (0, Some(libc::EAGAIN)),
            5 if is_allocation => (some_of(part), Some(libc::EOPNOTSUPP)),
            5..=9 if !is_allocation => (some_of(part).max(512), None),
            _ => (part.len, None),
        };
        Fate { len: len.min(part.len), errno }
    }
}

/// Less than all of a part; what remains has the same alignment, since it may be direct I/O.
fn some_of(part: &Part) -> u64 {
    let is_aligned = (part.at | part.len).is_multiple_of(4096);
    let unit = if is_aligned { 4096 } else { 512 };
    let units = usize::try_from(part.len / unit).unwrap_or(usize::MAX);
    below(units) as u64 * unit
}

impl<R> Ring<'_, R> {
    /// Replaces [`Ring::enter`].
    pub(super) fn enter_injected(&mut self, wait: bool) -> io::Result<()> {
        let chosen = self.injected.choose(wait);
        let (mut ended, mut begun) = (Vec::new(), Vec::new());
        // The kernel may use them until the parts are complete.
        let mut shortened = Vec::new();
        for (slot, index) in chosen {
            let data = (slot as u64) << 32 | index as u64;
            let plan = &self.slots[slot].plan;
            let part = plan.parts[index];
            let Fate { len, errno } = Fate::of(&part);
            if len == 0 {
                ended.push(Completion { data, result: -errno.unwrap_or(libc::EIO), more: false });
                continue;
            }
            let bytes = usize::try_from(len).unwrap_or(usize::MAX);
            shortened.push(prefix(&plan.iovecs[part.first..part.last], bytes));
            let iovecs = shortened.last().map_or(&[][..], Vec::as_slice);
            begun.push((data, errno));
            self.engine.begin(Part { len, ..part }, iovecs, data);
        }
        self.complete(begun, &mut ended)?;
        ended.sort_by_key(|completion| completion.data);
        while !ended.is_empty() {
            let next = ended.swap_remove(below(ended.len()));
            self.injected.done.push_back(next);
        }
        Ok(())
    }

    /// Waits for all parts that were begun, each with the error that it then has.
    fn complete(
        &mut self,
        mut begun: Vec<(u64, Option<i32>)>,
        ended: &mut Vec<Completion>,
    ) -> io::Result<()> {
        loop {
            self.engine.enter(!begun.is_empty())?;
            while let Some(mut completion) = self.engine.next() {
                if completion.data & WATCH != 0 {
                    self.injected.watched.push_back(completion);
                    continue;
                }
                // A part that was not begun here was submitted before fault injection was enabled.
                let at = begun.iter().position(|(data, _)| *data == completion.data);
                let errno = at.and_then(|at| begun.swap_remove(at).1);
                if let Some(errno) = errno.filter(|_| completion.result >= 0) {
                    completion.result = -errno;
                }
                ended.push(completion);
            }
            if begun.is_empty() {
                return Ok(());
            }
        }
    }
}
