//! A session as messages for a successor, and the pause of its rings meanwhile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vhost::vhost_user::message::FrontendReq;

use super::{Device, PROTOCOL_FEATURES, Result, Session};
use crate::datapath::worker::handle::StopOrder;
use crate::process::descriptor::Foreign;
use crate::session::replay::Message;
use crate::session::vring::pause_all;
use crate::virtio::device_state::DeviceState;
use crate::virtio::notify::EventDescriptor;

impl<D: Device> Session<D> {
    /// The reason why the session cannot be handed over at the moment, if there is one.
    pub fn upgrade_blocker(&self) -> Option<&'static str> {
        if self.transfer.is_some() {
            Some("the frontend is transferring the device's state")
        } else if self.is_logging() {
            Some("the guest is being migrated")
        } else if self.check().is_err() {
            Some("the frontend has shortened its memory")
        } else if Foreign::any_unclosed() {
            Some("a descriptor that a frontend has passed cannot be closed yet")
        } else {
            None
        }
    }

    /// Completes the requests in flight, except for long ones that the successor finds in the
    /// in-flight area, and takes no more.
    pub fn pause(&mut self) {
        pause_all(&mut self.vrings, StopOrder::Leave);
    }

    /// Continues after [`Session::pause`].
    pub fn resume(&mut self) -> Result<()> {
        self.reconcile()
    }

    /// The guest's settings.
    pub fn device_state(&self) -> DeviceState {
        self.state()
    }

    /// Adopts the guest's settings from a predecessor, before any message.
    pub fn inherit_state(&mut self, state: DeviceState) -> Result<()> {
        // The predecessor's disk was open.
        self.served = true;
        self.adopt(state)
    }

    /// SET_BACKEND_REQ_FD: keeps the channel for requests to the frontend.
    pub fn keep_requests(&mut self, channel: OwnedFd) {
        self.requests = Some(channel);
    }

    /// The messages that bring a new session to the state of this one. Features come after the
    /// rings, so that each ring is complete when it starts. While rings run, their positions are
    /// out of date.
    pub fn export(&self) -> Vec<Message<BorrowedFd<'_>>> {
        let mut messages = vec![
            Message::new(FrontendReq::GET_FEATURES, &[]),
            // For the messages that follow. The session's own protocol features come last.
            Message::new(FrontendReq::SET_PROTOCOL_FEATURES, &[PROTOCOL_FEATURES.bits()]),
        ];
        if self.owned {
            messages.push(Message::new(FrontendReq::SET_OWNER, &[]));
        }
        // Before the memory, so that ring addresses are not checked before the rings start.
        for (queue, vring) in (0..).zip(&self.vrings) {
            messages.extend(vring.export(queue));
        }
        for (region, file) in self.memory.files() {
            let numbers =
                [0, region.guest_address, region.size, region.vmm_address, region.file_offset];
            messages.push(Message::new(FrontendReq::ADD_MEM_REG, &numbers).with(file.as_fd()));
        }
        if let Some((info, file)) = self.inflight.as_ref().and_then(|area| area.export()) {
            let mut message = Message::new(FrontendReq::SET_INFLIGHT_FD, &[info.size, info.offset]);
            message.body.extend(info.num_queues.to_ne_bytes());
            message.body.extend(info.queue_size.to_ne_bytes());
            message.body.extend([0; 4]);
            messages.push(message.with(file.as_fd()));
        }
        if let Some(channel) = &self.requests {
            let message = Message::new(FrontendReq::SET_BACKEND_REQ_FD, &[]);
            messages.push(message.with(channel.as_fd()));
        }
        if let Some((region, file)) = self.log.as_ref().and_then(|log| log.file()) {
            let message =
                Message::new(FrontendReq::SET_LOG_BASE, &[region.size, region.file_offset]);
            messages.push(message.with(file.as_fd()));
        }
        if let Some(call) = &self.log_call {
            messages.push(Message::new(FrontendReq::SET_LOG_FD, &[]).with(call.fd()));
        }
        if let Some(features) = self.features {
            messages.push(Message::new(FrontendReq::SET_FEATURES, &[features]));
        }
        for (queue, vring) in (0..).zip(&self.vrings) {
            if vring.is_enabled() {
                messages.push(Message::state(FrontendReq::SET_VRING_ENABLE, queue, 1));
            }
        }
        let own = self.protocol_features;
        messages.push(Message::new(FrontendReq::SET_PROTOCOL_FEATURES, &[own]));
        messages
    }
}
