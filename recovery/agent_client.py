"""What an agent asks of the control API."""

from urllib.parse import quote

from recovery.client import Client, Object


class AgentClient(Client):
    """A client that knows the routes of agents too."""

    @property
    def where(self) -> str:
        """Where it is asked."""
        return str(self._endpoint)

    def agent_vms(self, agent: str) -> list[Object]:
        """The VMs that an agent is to protect."""
        return self._list("GET", f"agents/{quote(agent)}/vms")

    def protect_agent_vm(self, agent: str, vm: str, body: Object) -> Object:
        """Let an agent protect a VM."""
        return self._object("PUT", f"agents/{quote(agent)}/vms/{quote(vm)}", body=body)

    def agent_vm_arrived(self, agent: str, vm: str) -> Object:
        """A VM that an agent waited for runs on its host."""
        return self._object("POST", f"agents/{quote(agent)}/vms/{quote(vm)}:arrived", body={})

    def report(self, agent: str, body: Object) -> Object:
        """What an agent sees."""
        return self._object("POST", f"agents/{quote(agent)}:report", body=body)

    def mirror(self, disk: str) -> Object:
        """The service's side of a mirror."""
        return self._object("GET", "mirror", query={"disk": disk})

    def tell_mirror(self, verb: str, body: Object) -> Object:
        """synced, holds, lost or size."""
        return self._object("POST", f"mirror:{verb}", body=body)
