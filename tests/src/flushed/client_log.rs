//! The report of the client, and of the script of a guest that is a host: lines of a word and its
//! arguments. The last one may be incomplete, since the power can fail at any moment.

use std::collections::BTreeSet;
use std::path::Path;

/// A program that was begun, as far as it was reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the program.
    pub program: u64,
    /// Sectors of the disk.
    pub disk_sectors: u64,
    /// An upper limit of how many operations were submitted.
    pub issued: u64,
    /// Operations that were reported as complete.
    pub completed: BTreeSet<u64>,
    /// Operations that failed.
    pub failed: BTreeSet<u64>,
    /// Flushes that succeeded: (operation, those that were not complete when it was submitted).
    pub flushes: Vec<(u64, BTreeSet<u64>)>,
}

/// One event on the disk, in the order of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The whole disk was read: its number of sectors.
    Dumped(u64),
    /// The daemon was ended, and exited with this status.
    Closed(i32),
    /// A program was begun.
    Run(Run),
    /// A tool was begun: its name, and its exit status if it came to its end.
    Tool(String, Option<i32>),
}

/// The report of one boot, or of one test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientLog {
    /// What happened to the disk.
    pub events: Vec<Event>,
    /// The host's boot id.
    pub boot: Option<String>,
    /// What must never happen.
    pub failures: Vec<String>,
    /// Statuses of other programs: (what was run, status).
    pub statuses: Vec<(String, i32)>,
    /// Everything, line by line.
    pub lines: Vec<String>,
}

impl ClientLog {
    /// Reads a file of lines; one that is not there is empty.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// Reads lines.
    pub fn parse(text: &str) -> Self {
        let mut client_log = Self::default();
        // Text after the last line feed is no complete line.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            client_log.lines.push(line.to_owned());
            client_log.line(line);
        }
        client_log
    }

    /// Whether a line begins with this word.
    pub fn has(&self, word: &str) -> bool {
        self.lines.iter().any(|line| line.split(' ').next() == Some(word))
    }

    fn line(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let numbers: Vec<u64> = rest.split(' ').map_while(|word| word.parse().ok()).collect();
        match (word, numbers.as_slice()) {
            ("boot", _) => self.boot = Some(rest.to_owned()),
            ("failure", _) => self.failures.push(rest.to_owned()),
            ("status", _) => self.statuses.extend(named_status(rest)),
            ("dumped", &[sectors]) => self.events.push(Event::Dumped(sectors)),
            ("closed", _) => {
                self.events.extend(rest.parse().map(Event::Closed));
            }
            ("tool", _) => self.events.push(Event::Tool(rest.to_owned(), None)),
            ("tool-ended", _) => {
                let Some((name, status)) = named_status(rest) else { return };
                let begun = |event: &&mut Event| **event == Event::Tool(name.clone(), None);
                if let Some(event) = self.events.iter_mut().rev().find(begun) {
                    *event = Event::Tool(name, Some(status));
                }
            }
            ("program", &[program, disk_sectors, ..]) => self.events.push(Event::Run(Run {
                program,
                disk_sectors,
                issued: 0,
                completed: BTreeSet::new(),
                failed: BTreeSet::new(),
                flushes: vec![],
            })),
            (_, &[number, ..]) => {
                if let Some(Event::Run(run)) = self.events.last_mut() {
                    run.line(word, number, rest);
                }
            }
            _ => {}
        }
    }
}

impl Run {
    fn line(&mut self, word: &str, number: u64, rest: &str) {
        match word {
            "issued" => self.issued = number,
            "completed" => {
                self.completed.insert(number);
            }
            "failed" => {
                self.failed.insert(number);
            }
            "flushed" => {
                let Some((_, open)) = rest.split_once(' ') else { return };
                let open = open.split(',').filter_map(|op| op.parse().ok()).collect();
                self.flushes.push((number, open));
            }
            _ => {}
        }
    }

    /// The operations whose effect a later flush has made durable.
    pub fn durable(&self) -> BTreeSet<u64> {
        let mut durable = BTreeSet::new();
        for (flush, open) in &self.flushes {
            durable
                .extend((0..*flush).filter(|op| !open.contains(op) && !self.failed.contains(op)));
        }
        durable
    }
}

fn named_status(text: &str) -> Option<(String, i32)> {
    let (name, status) = text.rsplit_once(' ')?;
    Some((name.to_owned(), status.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_breaks_off_is_read_up_to_its_last_whole_line() {
        let client_log = ClientLog::parse(
            "boot b\ndumped 80\nprogram 1 80 x\nissued 16\nflushed 3 1,2\nissued 3",
        );
        let run = Run {
            program: 1,
            disk_sectors: 80,
            issued: 16,
            completed: BTreeSet::new(),
            failed: BTreeSet::new(),
            flushes: vec![(3, [1, 2].into())],
        };
        assert_eq!(client_log.events, [Event::Dumped(80), Event::Run(run.clone())]);
        assert_eq!(client_log.boot.as_deref(), Some("b"));
        assert_eq!(run.durable(), [0].into());
    }

    #[test]
    fn what_failed_is_not_durable_although_a_later_flush_succeeds() {
        let client_log = ClientLog::parse("program 1 80\nissued 16\nfailed 1\nflushed 3 -\n");
        let [Event::Run(run)] = client_log.events.as_slice() else { panic!("{client_log:?}") };
        assert_eq!(run.durable(), [0, 2].into());
    }

    #[test]
    fn a_tool_has_a_status_only_when_it_has_ended() {
        let client_log = ClientLog::parse(
            "tool reset\ntool-ended reset 0\ntool merge\nstatus cow check 3\nclosed -1\n",
        );
        let expected = [
            Event::Tool("reset".into(), Some(0)),
            Event::Tool("merge".into(), None),
            Event::Closed(-1),
        ];
        assert_eq!(client_log.events, expected);
        assert_eq!(client_log.statuses, [("cow check".to_owned(), 3)]);
    }
}
