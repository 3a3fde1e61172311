//! The history of one disk: boots of its host, each of which ends with a cut of its power, and a
//! last one that does not.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use blk_bench::load::rng::{Rng, mix};

use crate::files::TestDir;
use crate::flushed::model::{GROWTH, Verdict};
use crate::flushed::program::{chance, pick};
use crate::flushed::{ClientLog, Model, Tool, read_dump};
use crate::guest::Running;

use super::disk::{Survives, VolatileDisk};
use super::host::{Host, Lie, Variant, dump_path};
use super::nbd::{Server, wait_until};

/// For a boot of the host up to what is waited for, under TCG on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(600);
/// For a disk that is to freeze at its next requests: if there are none it is cut as it is.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// So often the last boot is tried: QEMU can crash, which is a cut like others.
const LAST_BOOTS: u32 = 3;
/// The exit status of `cow check` where space is allocated that nothing needs.
const LEAKS: i32 = 3;

/// What came of one boot.
pub struct Report {
    /// What was done, and how much it has shown, in a few lines.
    pub text: String,
    /// What must not be.
    pub violations: Vec<String>,
    /// The power went before its time.
    crashed: bool,
}

/// When the power goes.
#[derive(Clone, Debug)]
enum Moment {
    /// While the last program runs: so long after its beginning, and then with the disk's next
    /// requests, if a number is given.
    Load { after: Duration, requests: Option<u64> },
    /// After this word was reported, with the disk's next requests.
    Word { word: String, requests: u64 },
    /// Not at all: the script comes to its end.
    Never,
}

/// What a boot does, drawn before it.
struct Plan {
    script: String,
    /// The word that the last program begins with.
    load: String,
    moment: Moment,
    survives: Survives,
    tool: Option<Tool>,
    about: String,
}

/// One disk and its host.
pub struct Series {
    dir: TestDir,
    host: Host,
    variant: Variant,
    lie: Option<Lie>,
    seed: u64,
    rng: Rng,
    model: Model,
    server: Server,
    image: PathBuf,
    boots: u32,
    programs: u64,
    snapshots: u64,
    rebased: bool,
    interrupted: Option<Tool>,
    boot_ids: Vec<String>,
}

impl Series {
    /// A new disk. `client` is the program of `flush-client`.
    pub fn new(variant: Variant, seed: u64, lie: Option<Lie>, client: &Path) -> Self {
        let dir = TestDir::new();
        let image = dir.path("disk");
        let host = Host::new(&dir, &image, variant, lie, client);
        let file =
            OpenOptions::new().read(true).write(true).open(&image).expect("the disk's image");
        let disk = VolatileDisk::new(file).expect("a disk");
        let server = Server::start(&dir.path("nbd"), disk, seed).expect("a socket");
        if lie == Some(Lie::FlushesTakenBack) {
            server.take_back_flushes(4);
        }
        Self {
            dir,
            host,
            variant,
            lie,
            seed,
            rng: Rng::new(mix(seed)),
            model: Model::new(seed),
            server,
            image,
            boots: 0,
            programs: 0,
            snapshots: 0,
            rebased: false,
            interrupted: None,
            boot_ids: vec![],
        }
    }

    /// Boots the host, and cuts its power.
    pub fn cut(&mut self) -> Report {
        let plan = if self.lie.is_some() { self.plan_of_a_lie() } else { self.plan() };
        self.execute(plan)
    }

    /// Boots the host, reads the disk, closes it and checks its file.
    pub fn finish(&mut self) -> Report {
        for _ in 1..LAST_BOOTS {
            let report = self.try_to_finish();
            if !report.crashed {
                return report;
            }
            println!("QEMU has crashed: {}", report.text);
        }
        self.try_to_finish()
    }

    fn try_to_finish(&mut self) -> Report {
        let mut script = self.mount("");
        script += "[ ! -e \"$(top)\" ] || status check_after_cut cow check \"$(top)\"\n";
        script += "serve\ndump\nclose_disk\n";
        if self.lie.is_none() {
            script += "check_closed\n";
        }
        script += "unmount_disk\n";
        let plan = Plan {
            script,
            load: String::new(),
            moment: Moment::Never,
            survives: Survives::All,
            tool: None,
            about: "no cut".into(),
        };
        self.execute(plan)
    }

    /// Copies what is needed to examine a failure, and prints where it is.
    ///
    /// # Panics
    /// If it cannot be copied.
    pub fn keep(&self, parent: &Path) -> PathBuf {
        let place = parent.join(format!("powercut-{}", self.seed));
        fs::create_dir_all(&place).expect("a directory");
        for boot in 1..=self.boots {
            for kind in ["told", "console"] {
                let name = format!("boot-{boot}.{kind}");
                // One that was not begun is not there.
                let _ = fs::copy(self.dir.path(&name), place.join(name));
            }
        }
        fs::copy(&self.image, place.join("disk")).expect("a copy of the disk");
        fs::copy(dump_path(&self.dir), place.join("dump")).expect("a copy of the dump");
        place
    }

    fn mount(&mut self, options: &str) -> String {
        let file_system = self.variant.file_system.name();
        let mut script = format!("mount_disk {file_system} /dev/vda '{options}'\n");
        if let Some(tool) = self.interrupted.take() {
            let _ = writeln!(script, "tool_again {} /mnt/{}.cow", tool.name(), self.snapshots);
        }
        script
    }

    fn next_program(&mut self) -> u64 {
        self.programs += 1;
        self.programs
    }

    /// A program whose last flush is taken back, or was none: what matters is that it is found.
    fn plan_of_a_lie(&mut self) -> Plan {
        let mut script = self.mount("");
        if self.boots == 0 {
            script += "serve\n";
        } else {
            script += "serve\ndump\n";
        }
        let program = self.next_program();
        let mode = if self.lie == Some(Lie::FlushesNotSent) { "lies" } else { "" };
        let _ = writeln!(script, "play {} {program} '{mode}'", self.seed);
        let after = Duration::from_millis(500 + self.rng.below(3000));
        Plan {
            script,
            load: format!("program {program} "),
            moment: Moment::Load { after, requests: Some(1 + self.rng.below(8)) },
            survives: match self.lie {
                Some(Lie::HalfOfSyncs) => {
                    pick(&mut self.rng, &[Survives::Writes, Survives::Sectors])
                }
                _ => Survives::Nothing,
            },
            tool: None,
            about: format!("{:?}, program {program}", self.lie),
        }
    }

    fn plan(&mut self) -> Plan {
        let options = pick(&mut self.rng, self.variant.file_system.mount_options());
        let mut script = self.mount(options);
        let mut about = format!("mount '{options}'");
        if chance(&mut self.rng, 50) {
            let centiseconds = pick(&mut self.rng, &[5, 20, 100]);
            let _ = writeln!(script, "write_back_after {centiseconds}");
            let _ = write!(about, ", written back after {centiseconds}");
        }
        if self.boots == 0 {
            self.make_disk(&mut script)
        } else {
            self.recover(&mut script, &mut about)
        }
        let tool = self.draw_tool();
        if let Some(tool) = tool {
            script += "close_disk\n";
            let _ = match tool {
                Tool::Resize => writeln!(script, "tool_resize {}", GROWTH * 512),
                _ => writeln!(script, "tool_{}", tool.name()),
            };
            script += "serve\n";
            self.snapshots += u64::from(tool == Tool::Snapshot);
            self.rebased |= tool == Tool::Rebase;
            let _ = write!(about, ", {}", tool.name());
        }
        if tool.is_none() && chance(&mut self.rng, 30) {
            let program = self.next_program();
            let tenths = self.rng.below(20);
            let (seed, seconds) = (self.seed, tenths / 10);
            let _ = writeln!(script, "kill_under_load {seed} {program} {seconds}.{}", tenths % 10);
            let _ = write!(about, ", killed under program {program}");
        }
        let program = self.next_program();
        let _ = writeln!(script, "play {} {program} ''", self.seed);
        let _ = write!(about, ", program {program}");
        let delay = pick(&mut self.rng, &[0, 0, 2, 10]);
        self.server.delay_flushes(Duration::from_millis(delay));
        let moment = self.draw_moment(tool);
        let survives = pick(&mut self.rng, &Survives::ALL);
        Plan { script, load: format!("program {program} "), moment, survives, tool, about }
    }

    /// A new file, or a chain of them with something in each.
    fn make_disk(&mut self, script: &mut String) {
        let layers = if self.variant.uml { 0 } else { self.rng.below(3) };
        *script += "serve\n";
        for _ in 0..layers {
            let program = self.next_program();
            let count = 20 + self.rng.below(60);
            let _ = writeln!(script, "play {} {program} count={count}", self.seed);
            *script += "close_disk\ntool_snapshot\nserve\n";
            self.snapshots += 1;
        }
    }

    /// What is done with the file before its disk is served again, and then.
    fn recover(&mut self, script: &mut String, about: &mut String) {
        let before = pick(&mut self.rng, &["", "", "check", "repair", "merge"]);
        // A cut in the making of the file may have left none.
        *script += "if [ -e \"$(top)\" ]; then :\n";
        *script += match before {
            "check" => "status check_after_cut cow check \"$(top)\"\n",
            "repair" => {
                "status repair cow check --repair \"$(top)\"\nstatus check cow check \"$(top)\"\n"
            }
            "merge" => "merge_after_cut\n",
            _ => "",
        };
        *script += "fi\nserve\ndump\n";
        if before == "merge" {
            *script += "[ ! -e /tmp/merged ] || compare_merged 0\n";
        }
        let after = pick(&mut self.rng, &["", "", "close", "kill"]);
        *script += match after {
            "close" => "close_disk\ncheck_closed\nserve\n",
            "kill" => "kill_idle\n",
            _ => "",
        };
        let _ = write!(about, ", before '{before}', after '{after}'");
    }

    fn draw_tool(&mut self) -> Option<Tool> {
        // The file that a cut in its making left, or did not leave, is no disk yet that was read.
        if self.boots == 0 || !chance(&mut self.rng, 50) {
            return None;
        }
        let mut tools = vec![Tool::Merge, Tool::Reset];
        if !self.variant.uml {
            tools.extend([Tool::Snapshot, Tool::Resize]);
        }
        if !self.rebased {
            tools.push(Tool::Rebase);
        }
        Some(pick(&mut self.rng, &tools))
    }

    fn draw_moment(&mut self, tool: Option<Tool>) -> Moment {
        // Many of the first requests, and few of the later ones.
        let magnitude = self.rng.below(7);
        let requests = 1 + self.rng.below(1 << magnitude);
        let word = |word: &str| Moment::Word { word: word.to_owned(), requests };
        if tool.is_some() && chance(&mut self.rng, 70) {
            return word("tool ");
        }
        if chance(&mut self.rng, 25) {
            let words: &[&str] =
                if self.boots == 0 { &["serving"] } else { &["mounted", "serving", "connected"] };
            return word(pick(&mut self.rng, words));
        }
        let longest = pick(&mut self.rng, &[1000, 5000]);
        let after = Duration::from_millis(20 + self.rng.below(longest));
        let requests = chance(&mut self.rng, 75).then_some(requests);
        Moment::Load { after, requests }
    }

    fn execute(&mut self, plan: Plan) -> Report {
        self.boots += 1;
        let name = format!("boot-{}", self.boots);
        let log_path = self.dir.path(&format!("{name}.told"));
        let nbd = self.server.socket().display();
        let drive = format!("driver=nbd,server.type=unix,server.path={nbd}");
        let mut guest = self.host.boot(&self.dir, &name, &drive, &plan.script);
        let mut violations = vec![];
        if let Err(why) = self.await_moment(&mut guest, &plan, &log_path) {
            violations.push(why);
        }
        fs::write(self.dir.path(&format!("{name}.console")), guest.output()).expect("a file");
        let crashed = guest.has_crashed();
        guest.kill();
        let cut = self.server.cut(plan.survives, self.rng.next_u64());
        let client_log = ClientLog::read(&log_path);
        let dump = dump_path(&self.dir);
        let mut slot = 0;
        let verdict = self.model.follow(&client_log, |sectors| {
            slot += 1;
            read_dump(&dump, slot - 1, sectors)
        });
        self.interrupted = plan.tool.filter(|tool| !has_ended(&client_log, *tool));
        violations.extend(verdict.violations.iter().cloned());
        violations.extend(self.further_violations(&client_log));
        let text = self.describe(&plan, &cut, &verdict);
        Report { text, violations, crashed }
    }

    /// Waits until the power is to be cut, or QEMU has crashed; returns what else went wrong
    /// before.
    fn await_moment(
        &self,
        guest: &mut Running,
        plan: &Plan,
        client_log: &Path,
    ) -> Result<(), String> {
        let text = || fs::read_to_string(client_log).unwrap_or_default();
        let mut wait_for = |word: &str| {
            let mut seen = String::new();
            let is_there =
                |text: &str| text.lines().any(|line| format!("{line} ").starts_with(word));
            let reached = wait_until(BOOT_TIMEOUT, || {
                let ended = guest.has_ended();
                seen = text();
                is_there(&seen) || seen.contains("failure ") || ended
            });
            let failed = seen.lines().find(|line| line.starts_with("failure "));
            match failed {
                _ if reached && is_there(&seen) => Ok(true),
                None if guest.has_crashed() => Ok(false),
                Some(line) => Err(format!("before {word:?}: {line}")),
                None => Err(format!("no {word:?}; the host ended: {}", guest.has_ended())),
            }
        };
        match &plan.moment {
            Moment::Load { after, requests } => {
                if wait_for(&plan.load)? {
                    thread::sleep(*after);
                    if let Some(requests) = requests {
                        self.server.freeze_after(*requests, FREEZE_TIMEOUT);
                    }
                }
            }
            Moment::Word { word, requests } => {
                if wait_for(word)? {
                    self.server.freeze_after(*requests, FREEZE_TIMEOUT);
                }
            }
            Moment::Never => {
                wait_for("over")?;
            }
        }
        Ok(())
    }

    /// Other reported events that must not happen.
    fn further_violations(&mut self, client_log: &ClientLog) -> Vec<String> {
        let mut violations = client_log.failures.clone();
        for (what, status) in &client_log.statuses {
            let right = *status == 0 || (*status == LEAKS && what.starts_with("check"));
            if !right {
                violations.push(format!("{what} ended with {status}"));
            }
        }
        // Under the boot id of its predecessor a host would trust what only the page cache had.
        if let Some(boot) = &client_log.boot {
            if self.boot_ids.contains(boot) {
                violations
                    .push(format!("the boot id {boot} came twice: that is this test's fault"));
            }
            self.boot_ids.push(boot.clone());
        }
        violations
    }

    fn describe(&self, plan: &Plan, cut: &str, verdict: &Verdict) -> String {
        let Plan { moment, survives, about, .. } = plan;
        format!(
            "{}, seed {}, boot {}: {about}\n  cut {moment:?}, {survives:?}: {cut}\n  {} dumps, {} violations, {} sectors \
             open before, {} newer than flushed; {} flushes, {} durable sectors",
            self.variant,
            self.seed,
            self.boots,
            verdict.dumps,
            verdict.violations.len(),
            verdict.open,
            verdict.newer,
            verdict.flushes,
            verdict.durable_sectors,
        )
    }
}

fn has_ended(client_log: &ClientLog, tool: Tool) -> bool {
    client_log.lines.iter().any(|line| *line == format!("tool-ended {} 0", tool.name()))
}
