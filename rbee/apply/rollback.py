"""Bring hosts back to what an earlier apply brought them to: the same path as an apply, from the host's own memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from rbee.apply.desired import SECRETS, Desired
from rbee.apply.plan import HostPlan, fingerprint
from rbee.apply.records import Past, past_of, state_name, state_of, states_at, states_before
from rbee.apply.ssh import Session
from rbee.apply.survey import Survey
from rbee.errors import HostFailed
from rbee.inventory.fleet import Host

CERTIFICATE = (f"{SECRETS}/host.crt", f"{SECRETS}/host.key")


@dataclass
class Rollback(Survey):
    """A survey whose wanted states are those that the hosts keep, not the inventory's."""

    to: str = ""
    """A state's name or revision; empty: the state before the last apply."""
    left: dict[str, str] = field(default_factory=dict)
    """Hosts that stay as they are, and why."""
    _pasts: dict[str, Past] = field(default_factory=dict)
    _sessions: dict[str, Session] = field(default_factory=dict)
    _chosen: dict[str, str] | None = None

    @classmethod
    def of(cls, survey: Survey, to: str) -> Rollback:
        """Return the survey of a rollback of the same fleet."""
        return cls(survey.fleet, survey.identity, survey.revision, survey.state, "rollback", to=to)

    def observe(self, host: Host, session: Session) -> None:
        """Have the agent tell what the host has and what it remembers. Raises: HostProblem."""
        super().observe(host, session)
        self._pasts[host.name] = past_of(session.ask("history", lines=1))
        self._sessions[host.name] = session

    def plan(self, host: Host) -> HostPlan:
        """Return what leads back to the host's earlier state. Raises: HostFailed, NotFound."""
        state = self._states().get(host.name)
        if state is None:
            self.left[host.name] = "it had no state then" if self.to else "the last apply did not touch it"
            return HostPlan(host=host.name, observed=fingerprint(self.seen[host.name]))
        if not state:
            raise HostFailed(host.name, "it has no earlier state to go back to", hint=f"rbee history {host.name}")
        wanted = self.wanted[host.name] = self._document(host, state)
        return self.compare(host, wanted, None)

    def _states(self) -> dict[str, str]:
        if self._chosen is None:
            self._chosen = states_at(self._pasts, self.to) if self.to else states_before(self._pasts)
            self.revision = state_of(max(self._chosen.values(), default="") or self.state).revision
            self.state = state_name(self.revision)
        return self._chosen

    def _document(self, host: Host, state: str) -> Desired:
        """Return what the host was brought to, with the certificate that it has or should have."""
        document = self._sessions[host.name].ask("history", name=state)["document"]
        try:
            kept = msgspec.convert(document, Desired)
        except msgspec.ValidationError as problem:
            raise HostFailed(host.name, f"its state {state} cannot be read: {problem}", hint="another --to") from None
        if kept.authority != self.identity.authority:
            raise HostFailed(
                host.name,
                f"its state {state} belongs to another identity than the one in {self.identity.folder}",
                hint="rbee apply, or bring that folder back",
            )
        if kept.release not in self.seen[host.name]["releases"]:
            raise HostFailed(
                host.name,
                f"the release {kept.release} of its state {state} is not there any more",
                hint="rbee apply, with the rbee of that time",
            )
        files = {path: file for path, file in kept.files.items() if path not in CERTIFICATE}
        return msgspec.structs.replace(kept, files={**files, **self._certificate(host, self.seen[host.name])})
