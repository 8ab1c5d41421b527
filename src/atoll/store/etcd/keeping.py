"""Keeping a lease of etcd alive from a thread, over connections of its own: what the event loop does does not hold it up."""

from __future__ import annotations

import time
from typing import Any

import grpc
from aetcd import rpc

from atoll.model.errors import AtollError, NotFound, Unavailable
from atoll.model.ports.store import LeaseId
from atoll.store.etcd.address import EtcdAddress
from atoll.store.etcd.errors import Fault, judge
from atoll.store.etcd.members import OPTIONS, TRY_S

PAUSE_S = 0.1
"""After each has been asked in vain, and before they are asked again."""


class EtcdLeaseKeeper:
    """Implements `LeaseKeeper`. Every call blocks. Members are asked one after another, beginning with the last that answered."""

    def __init__(self, address: EtcdAddress) -> None:
        self._address = address
        self._channels: dict[str, grpc.Channel] = {}
        self._current = 0
        self._token = ""

    def keep_alive(self, lease: LeaseId, wait_s: float) -> None:
        """See `LeaseKeeper.keep_alive`."""
        deadline = time.monotonic() + wait_s
        cause, tries = "no time", 0
        while (left_s := deadline - time.monotonic()) > 0:
            target = self._address.members[self._current % len(self._address.members)]
            try:
                answer = self._ask(target, lease, min(TRY_S, left_s))
            except grpc.RpcError as error:
                verdict = judge(error)  # it asks for the code and the details, which errors of both kinds of gRPC have
                if isinstance(verdict, AtollError):
                    raise verdict from None
                if verdict is Fault.TOKEN:
                    self._token = ""
                cause = f"{target}: {error.details()}"
            else:
                if answer is not None and answer.TTL <= 0:
                    raise NotFound(f"lease {lease} is not there; it has expired or was revoked")
                if answer is not None:
                    return
                cause = f"{target}: it ended the call without an answer"
            self._current += 1
            tries += 1
            if tries % len(self._address.members) == 0:
                time.sleep(min(PAUSE_S, max(0.0, deadline - time.monotonic())))
        raise Unavailable(f"no member of {self._address} keeps the lease alive: {cause}")

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _ask(self, target: str, lease: LeaseId, wait_s: float) -> Any:
        channel = self._channels.get(target)
        if channel is None:
            channel = self._channels[target] = self._connect(target)
        metadata = [("hasleader", "true")]
        if self._address.user:
            if not self._token:
                login = rpc.AuthenticateRequest(name=self._address.user, password=self._address.password)
                self._token = rpc.AuthStub(channel).Authenticate(login, timeout=wait_s).token
            metadata.append(("token", self._token))
        request = iter((rpc.LeaseKeepAliveRequest(ID=lease),))
        call = rpc.LeaseStub(channel).LeaseKeepAlive(request, timeout=wait_s, metadata=metadata)
        try:
            return next(call, None)
        finally:
            call.cancel()

    def _connect(self, target: str) -> grpc.Channel:
        if self._address.ca is None:
            return grpc.insecure_channel(target, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(self._address.ca, self._address.key, self._address.cert)
        return grpc.secure_channel(target, credentials, options=OPTIONS)
